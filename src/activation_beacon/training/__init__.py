"""Training: from documents and questions to the beacon parameters of any decoder."""
