"""Load a recipe's model: tokenizer, chat template, precision, quantization, adapters, weights.

A checked recipe comes in. The tokenizer, configs and weights that training and answering share go out. It never writes a
chat template of its own, never loads pickled weights, and never decides what the recipe says.

Use `tokenizer`, `precision`, `loading` and `generation`.
"""
