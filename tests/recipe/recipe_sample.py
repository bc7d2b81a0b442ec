"""One valid recipe with every stage kind, for tests that break it."""

VALID = """\
name: small
seed: 42
precision: bf16
runtime: {device: cpu}
stages:
  base:
    kind: pretrain
    init: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 128}
    tokenizer: {vocab_size: 4000}
    data:
      sources:
        - {path: ./texts.jsonl, weight: 2.0}
        - path: ./more.jsonl
          rows: 10
      max_length: 512
    trainer: {learning_rate: 5e-3, max_steps: 400, warmup_steps: 0.1, global_batch_size: 4}
    snapshots: {every: 100}
  sft:
    kind: sft
    model: "@base"
    chat_template: chatml
    data: {sources: [{path: ./chats.jsonl}], max_length: 256}
    method: {qlora: {r: 16, target_modules: [q_proj, v_proj]}}
    trainer: {learning_rate: 2e-4, num_train_epochs: 3}
  instruct: {kind: merge, model: "@sft"}
  dpo:
    kind: dpo
    model: "@sft"
    data: {sources: [{path: ./pairs.jsonl}]}
    trainer:
      loss_type: [sigmoid, sft]
      loss_weights: [1.0, 0.2]
      beta: 0.1
  aligned: {kind: merge, model: "@dpo"}
  report:
    kind: evaluate
    models: {base: "@base", instruct: "@instruct", aligned: "@aligned"}
    suites:
      - name: questions
        kind: generate
        data: [{path: ./heldout.jsonl}]
        checks: [{name: right, kind: any_of, field: answers}, {name: stops, kind: stops}]
    require:
      - {suite: questions, metric: right, model: aligned, minus: instruct, interval_above: 0}
  release: {kind: publish, model: "@aligned", report: "@report"}
"""
