"""Analysis of data sets, trained models and what methods look at."""
