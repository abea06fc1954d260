# The part of botocore that posae uses.
UNSIGNED: object
