"""MediBot: recipes that fine-tune small language models on medical questions with TRL."""
