"""What a run on N GPUs will take, before it is started: memory, time, traffic and money. Plain Python.

``docs/scaling.md`` says how the model was made, and how far it is from what others have published.
"""
