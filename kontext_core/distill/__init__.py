"""Distillation: a student of 1, 2 and 4 steps from a teacher of many, by LADD or by plain regression."""
