"""The checker behind every annotation while the tests run: shapes by jaxtyping, the rest by beartype.

An int may stand where a float is asked for, as PEP 484 has it; beartype refuses that unless told.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
