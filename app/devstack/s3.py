"""S3, as moto's server implements it: conditional writes and Object Lock are right, speed is not its point."""

from app.devstack.moto import MotoService


class S3Service(MotoService):
    """One S3 endpoint."""

    name = "s3"
    endpoint_variable = "AWS_ENDPOINT_URL_S3"
