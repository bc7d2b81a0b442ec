"""`posttrain run --executor slurm`: each stage that must run becomes a job of a Slurm cluster."""
