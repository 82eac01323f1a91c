"""Credit decisions on real data: 1,000 applicants, three models, one route.

`applicants` reads the data, `train` makes the model artifacts, `server` answers for two of the models over the Open
Inference Protocol, `runner` runs the third inside a pool worker, `loads` puts what is known beforehand into the
feature store, and `documents` writes the registry documents that bind all of it together.
"""
