"""Uses a trained model: predicts, evaluates again, and exports it for other programs."""
