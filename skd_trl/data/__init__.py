"""From rows of a data set to prompts, reference responses and batches."""
