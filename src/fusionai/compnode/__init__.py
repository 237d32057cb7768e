"""The provider agent: joins, measures itself, hosts sub-DAGs."""
