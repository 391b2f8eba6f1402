"""Run the steps on the connection that the app gives."""

from alembic import context

from simdetr.app.tables import Table

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
