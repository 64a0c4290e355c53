"""The training loop and what surrounds it; knows neither Ray nor MLflow."""
