"""Plan a training before a weight is loaded.

A checked recipe, its prepared rows and the hardware come in. Memory, time and disk go out, and the options that cannot
work together on that hardware, as errors. It never reads a weight and never starts a training.

Use `plan.make_plan`, `plan.plan_recipe`, `hardware.read_hardware`, `gpus.require_usable_gpus` and
`conflicts.refuse_conflicts`.
"""
