"""A small model hub on this machine: real HTTP, local folders as repositories, and failures on demand.

Speaks what huggingface_hub 1.33 asks for when it reads (model info with sizes and LFS hashes, the tree listing, and
``resolve`` with its headers) and when it writes (whoami, creation, preupload, Git LFS with one or several parts,
commits). Large files come from and go to a storage host with signed addresses; here that is the same server under its
other name (``localhost`` instead of ``127.0.0.1``), so that a token sent there would show in ``requests``.

    with HubServer() as hub:
        hub.add("owner/name", folder)
        hub.misbehave(Fault("model.safetensors", drop_after=1000, times=2))
        ... HF_ENDPOINT=hub.endpoint ...

    with HubServer(root=tmp_path / "hub", accounts={"hf_ann": Account("ann")}) as hub:
        hub.misbehave_in_writing(WriteFault("part", drop_after=1000))
        ... HF_ENDPOINT=hub.endpoint HF_TOKEN=hf_ann ...
"""

from hub_server.hub import HubServer
from hub_server.records import Account, Commit, Fault, Repository, Request, WriteFault

__all__ = ["Account", "Commit", "Fault", "HubServer", "Repository", "Request", "WriteFault"]
