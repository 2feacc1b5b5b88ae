"""The ops under the names and argument orders of other libraries."""
