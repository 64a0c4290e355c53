"""What training needs around its steps: the run's folder."""
