"""The eval section of a recipe: perplexity and KL of every stage, lm-eval tasks, answers to prompts."""
