"""Reads model and adapter files, writes merged ones: torch and safetensors' format only, no transformers, no peft.

header, checkpoint   what a folder holds, read lazily; no torch
tensors              its tensors in memory: rows on demand, or read ahead by a thread
adapter, experts     what an adapter holds, by the names of the files
plan                 what adapters do to which tensor
edits, quantization  the arithmetic, in fp32 row blocks
writer, config       what goes to disk
merge, report        the whole, and its figures
"""
