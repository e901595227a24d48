"""Text, images and documents from a trained model."""
