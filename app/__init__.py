"""Model Broker: model decisions for a lender's applications, none lost, none made twice, none unexplained."""

__version__ = "0.1.0"
