"""NeuRMS beneath its optimizer: tapped layers, pending statistics, gradients scaled in place."""
