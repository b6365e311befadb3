"""Results of trials: schema, numbers, and pandas frames."""
