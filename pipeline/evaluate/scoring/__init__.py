"""What evaluation says of features, and of the model that runs on what an autoencoder reconstructs."""
