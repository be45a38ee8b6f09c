"""Turn a finished run into something to hand over.

In comes a finished run's folder; out go merged weights with their proof, a GGUF file with Ollama's Modelfile, a model
card, and an upload to the hub. Nothing here trains, opens the test split, or sends anything that was not asked for.

Use `merge.merge`, `gguf.export_gguf`, `card.write_cards`, `push.push` and `engines.serving_lines`.
"""
