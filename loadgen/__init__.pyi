from loadgen.report import Report as Report
from loadgen.report import Verdict as Verdict
from loadgen.runner import run as run
from loadgen.runner import run_async as run_async
from loadgen.spec import LoadError as LoadError
from loadgen.spec import LoadSpec as LoadSpec
