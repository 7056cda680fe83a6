"""What a student is worth: texts, divergence to the teacher, use as a draft model, before and after, and the report of a run."""
