"""MLflow runs and figures; the only place that imports mlflow."""
