"""Our subclasses of TRL's trainers: the only place that knows TRL's insides."""
