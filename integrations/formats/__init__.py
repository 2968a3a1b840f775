"""Second moments in the form in which other projects take them: model editing and quantisation. None of these has to be installed.

- `write_memit` (`memit`): the statistics of ROME and MEMIT.
- `write_projectors` (`alphaedit`): AlphaEdit's projectors.
- `hessians` (`gptq`): the Hessians of GPTQ.
"""

from nullspace.integrations.formats.alphaedit import write_projectors
from nullspace.integrations.formats.gptq import hessians
from nullspace.integrations.formats.memit import write_memit

__all__ = ["hessians", "write_memit", "write_projectors"]
