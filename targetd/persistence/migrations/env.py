"""Run by Alembic: applies the versions on the connection that ``upgrade`` in this package was given."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
