"""Fine-tuning on tasks of language understanding: reading them, tuning a rack on them, and what simple methods reach."""
