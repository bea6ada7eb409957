package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// recordJSON is the machine-readable form of a record.
type recordJSON struct {
	ID       checkpoint.ID        `json:"id,omitempty"`
	State    store.State          `json:"state"`
	Path     string               `json:"path"`
	Reason   string               `json:"reason,omitempty"`
	Error    string               `json:"error,omitempty"`
	Owner    *store.Owner         `json:"owner,omitempty"`
	Manifest *checkpoint.Manifest `json:"manifest,omitempty"`
}

func toJSON(r store.Record) recordJSON {
	j := recordJSON{ID: r.ID, State: r.State, Path: r.Path, Reason: r.Reason, Owner: r.Owner, Manifest: r.Manifest}
	if r.Err != nil {
		j.Error = r.Err.Error()
	}
	return j
}

func (c *cli) lsCommand() *cobra.Command {
	var states []string
	var namespace string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the checkpoints",
		Long: `ls lists the checkpoints of the store, sorted by identity (namespace, key,
container) and time.

States:
  committed    complete; the next container of its identity may begin from it
  claimed      being restored at this moment
  quarantined  set aside, since it could not be restored; NOTE says why
  corrupt      its manifest is missing or damaged`,
		Example: `  stasis ls
  stasis ls --state quarantined
  stasis ls -o json | jq -r '.[].manifest.identity.container'`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, s := range states {
				if !slices.Contains([]store.State{store.Committed, store.Claimed, store.Quarantined, store.Corrupt}, store.State(s)) {
					return usageError{fmt.Errorf("--state %q: want committed, claimed, quarantined or corrupt", s)}
				}
			}
			st, err := c.open()
			if err != nil {
				return err
			}
			records, err := st.List(cmd.Context())
			if err != nil {
				return err
			}
			records = slices.DeleteFunc(records, func(r store.Record) bool {
				return len(states) > 0 && !slices.Contains(states, string(r.State)) ||
					namespace != "" && (r.Manifest == nil || r.Manifest.Identity.Namespace != namespace)
			})
			if c.output == "json" {
				list := []recordJSON{}
				for _, r := range records {
					list = append(list, toJSON(r))
				}
				return c.printJSON(list)
			}
			t := newTable(c.out, "ID", "IDENTITY", "POD", "STATE", "AGE", "SIZE", "NOTE")
			for _, r := range records {
				row := []string{string(r.ID), "", "", string(r.State), age(r.Time()), "", r.Reason}
				if row[0] == "" {
					row[0] = r.Path
				}
				if m := r.Manifest; m != nil {
					row[1], row[2], row[5] = m.Identity.String(), m.PodName, size(m.Sizes.TotalBytes)
				}
				if r.Owner != nil {
					row[6] = fmt.Sprintf("by process %d for container %s", r.Owner.PID, r.Owner.ContainerID)
				}
				if r.Err != nil {
					row[6] = r.Err.Error()
				}
				t.row(row...)
			}
			return t.flush()
		},
	}
	cmd.Flags().StringSliceVar(&states, "state", nil, "only those in this state; may be repeated")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only those of this namespace")
	return cmd
}

func (c *cli) verifyCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "verify {ID... | --all}",
		Short: "Read checkpoints and compare their checksums",
		Long: `verify reads every file of a checkpoint and compares size and checksum with the
manifest. A checkpoint that lacks a file, has one too many, or holds anything
but regular files is damaged as well. Nothing is changed: the shim verifies a
checkpoint again before it uses it, and sets a damaged one aside.`,
		Example: `  stasis verify 0123456789abcdef-20260102T150405-89abcdef
  stasis verify --all`,
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usageError{fmt.Errorf("give IDs, or --all")}
			}
			return nil
		},
		ValidArgsFunction: c.completeIDs,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			var records []store.Record
			if all {
				if records, err = st.List(cmd.Context()); err != nil {
					return err
				}
			}
			for _, name := range args {
				r, err := resolve(cmd.Context(), st, name)
				if err != nil {
					return err
				}
				records = append(records, r)
			}
			type result struct {
				ID    checkpoint.ID `json:"id"`
				OK    bool          `json:"ok"`
				Error string        `json:"error,omitempty"`
			}
			results, bad := []result{}, 0
			for _, r := range records {
				err := r.Err
				if r.ID != "" && err == nil {
					err = st.Verify(cmd.Context(), r.ID)
				}
				res := result{ID: r.ID, OK: err == nil}
				if err != nil {
					res.Error = err.Error()
					bad++
				}
				if results = append(results, res); c.output == "table" {
					if res.OK {
						res.Error = "ok"
					}
					fmt.Fprintf(c.out, "%s  %s\n", clean(string(r.ID)), clean(res.Error))
				}
				if cmd.Context().Err() != nil {
					return cmd.Context().Err()
				}
			}
			if c.output == "json" {
				if err := c.printJSON(results); err != nil {
					return err
				}
			}
			if bad > 0 {
				return errSilent
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all of the store")
	return cmd
}
