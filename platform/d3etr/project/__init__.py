"""A project for a data set: recipes and their steps, sized to data, machine and minutes."""
