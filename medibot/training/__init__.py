"""Train a recipe with TRL's SFTTrainer.

A checked recipe and the hardware come in. A run's folder goes out: trained weights with all that answering needs, and
the record of how they came about. It never trains on what the gate refuses, never goes on as something else, and never
leaves anything half-written.

Use `session.train`, `launch.launch` and `inspection.inspect_recipe`.
"""
