"""The distilled student, its teacher, and how a student starts from a teacher."""
