"""
Serve a base and its adapters by the OpenAI API; requests for all of them run in one batch.

    python -m glm_peft.serve --model_name_or_path BASE --adapters ads=output/ads support=someone/support

docs/serving.md says what clients may ask, and how to run it.
"""

import sys
from importlib.util import find_spec

from glm_peft.arguments.address import bind, refuse_unsafe_host, url_of
from glm_peft.arguments.serve import parse_serve_arguments
from glm_peft.errors import UserError
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.process_errors import tell
from glm_peft.serving.answerers import parse_adapters

_PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")


@exit_with_user_errors()
def main() -> None:
    """Load a base and its adapters, and answer requests until SIGTERM or Ctrl-C."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"The server needs {', '.join(missing)}: `pip install -e '.[serve]'` installs what it needs.")
    from glm_peft.serving.engines import open_engine
    from glm_peft.serving.http.app import Service, build_app
    from glm_peft.serving.http.guards import Limits
    from glm_peft.serving.http.keys import KEY_VARIABLE, read_key
    from glm_peft.serving.http.server import Server
    from glm_peft.serving.http.summary import describe_server

    # What is wrong is told before anything is loaded, which takes minutes.
    model_args, args = parse_serve_arguments()
    set_up_logging()
    adapters = parse_adapters(args.adapters or [], model_args.adapter_name_or_path)
    key, shown_key = read_key(args.api_key_file) or (None, None)
    refuse_unsafe_host(args.host, key, "key", "--api_key_file", KEY_VARIABLE)
    listener = bind(args.host, args.port)

    engine = open_engine(model_args, adapters, args.cache_tokens, args.max_batch_tokens)
    limits = Limits(key, args.max_request_bytes, args.max_waiting)
    settings = GenerationSettings.from_arguments(args)
    app, gate = build_app(Service(engine, limits, settings, args.seed, args.allow_adapter_updates))
    greeting = describe_server(engine, adapters, model_args.model_name_or_path, url_of(listener), shown_key)
    try:
        Server(app, gate, engine, args.drain_seconds, greeting).run(sockets=[listener])
    finally:
        engine.close()
    if engine.failure() is not None:
        error = engine.failure()
        tell(f"error: The worker that generates failed ({type(error).__name__}: {error}): start the server again.")
        sys.exit(1)


if __name__ == "__main__":
    main()
