"""Evaluation: answers are generated, scored per question, and summarised over the task sequence."""
