"""Alembic's entry point; `database.Database` runs it when a file is opened."""

from alembic import context
from sqlalchemy import create_engine

from isologit.judge.database import Base

url = context.config.get_main_option("sqlalchemy.url")
assert url is not None
with create_engine(url).connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
