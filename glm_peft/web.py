"""
A page in the browser: compare the base and its adapters, examine data, train, look at adapters.

    python -m glm_peft.web --model_name_or_path BASE --adapters name=PATH …

It is seen from this machine alone, unless there is a password.
"""

from glm_peft.arguments.address import bind, url_of
from glm_peft.arguments.web import parse_web_arguments
from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.log import set_up_logging
from glm_peft.serving.answerers import parse_adapters
from glm_peft.serving.engines import open_engine


@exit_with_user_errors()
def main() -> None:
    """Load the base and its adapters, and show the page until Ctrl-C."""
    model_args, web_args = parse_web_arguments()
    set_up_logging()
    adapters = parse_adapters(web_args.adapters or [], model_args.adapter_name_or_path)
    folder = make_output_dir(web_args.output_dir).resolve()
    listener = bind(web_args.host, web_args.port)
    try:  # before the base, which takes long
        from glm_peft.page.app import make_server
    except ImportError as error:
        raise UserError("The page needs gradio: `pip install -e '.[web]'` installs it.") from error

    engine = open_engine(model_args, adapters)
    try:
        server = make_server(engine, model_args, adapters, folder, web_args.password)
        listener.listen()  # before it is told: who opens the page at once waits a moment and is not refused
        print(f"The page is at {url_of(listener)}", flush=True)
        server.run(sockets=[listener])
    finally:
        engine.close()


if __name__ == "__main__":
    main()
