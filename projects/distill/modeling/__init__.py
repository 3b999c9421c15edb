"""The distilled student, its teacher, and a student that starts with the teacher's weights."""
