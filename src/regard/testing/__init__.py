"""The conformance kit: the calls a backend must get right, and the one rule that says whether it did.

For the authors of backends, in this package and outside it::

    print(regard.testing.run_conformance("my_backend", device="cuda"))

or ``python -m regard.testing --backend my_backend --device cuda --json report.json``. In pytest, parametrize over
`CASES` and call `check_forward`, `check_backward` and `check_repeatable`. Every check goes through the public calls
with the backend chosen by name, so validation, selection, custom op and kernel are all under test. Where the backend
gives reasons against a case, the check becomes the negative one: the call must be refused with exactly these reasons.
"""

from regard.testing.calls import Call as Call
from regard.testing.calls import make_inputs as make_inputs
from regard.testing.cases import CASES as CASES
from regard.testing.cases import REPEATED_CASES as REPEATED_CASES
from regard.testing.cases import STRIDES as STRIDES
from regard.testing.cases import Case as Case
from regard.testing.checks import Result as Result
from regard.testing.checks import check_backward as check_backward
from regard.testing.checks import check_forward as check_forward
from regard.testing.checks import check_repeatable as check_repeatable
from regard.testing.report import Report as Report
from regard.testing.report import run_conformance as run_conformance
from regard.testing.tolerance import Comparison as Comparison
from regard.testing.tolerance import assert_close as assert_close
from regard.testing.tolerance import floor as floor
from regard.testing.tolerance import plain_attention as plain_attention
