package main

import (
	"bufio"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// removalJSON is the machine-readable form of a removal.
type removalJSON struct {
	ID        checkpoint.ID        `json:"id"`
	Identity  *checkpoint.Identity `json:"identity,omitempty"`
	SizeBytes int64                `json:"sizeBytes"`
	Reason    string               `json:"reason"`
	Removed   bool                 `json:"removed"`
}

func (c *cli) printRemovals(removals []removalJSON, dryRun bool) error {
	if c.output == "json" {
		if removals == nil {
			removals = []removalJSON{}
		}
		return c.printJSON(removals)
	}
	verb := "removed"
	if dryRun {
		verb = "would remove"
	}
	var sum int64
	for _, r := range removals {
		what := ""
		if r.Identity != nil {
			what = " of " + r.Identity.String()
		}
		fmt.Fprintf(c.out, "%s %s%s, %s: %s\n", verb, r.ID, clean(what), size(r.SizeBytes), clean(r.Reason))
		sum += r.SizeBytes
	}
	_, err := fmt.Fprintf(c.out, "%s %d checkpoints, %s\n", verb, len(removals), size(sum))
	return err
}

// tellRemoved writes a removal to the node's log.
func (c *cli) tellRemoved(r removalJSON, by string) error {
	return event.Append(c.root, event.Event{Type: event.Removed, Identity: r.Identity, CheckpointID: r.ID, SizeBytes: r.SizeBytes, Reason: by + ": " + r.Reason})
}

func (c *cli) rmCommand() *cobra.Command {
	var dryRun, yes bool
	cmd := &cobra.Command{
		Use:     "rm ID...",
		Aliases: []string{"remove"},
		Short:   "Remove checkpoints",
		Long: `rm removes checkpoints: the next container of that identity starts cold. One
that is claimed, that is, being restored, is not removed. On a terminal rm asks
first.`,
		Example: `  stasis rm 0123456789abcdef-20260102T150405-89abcdef
  stasis rm --dry-run 0123
  stasis ls --state quarantined -o json | jq -r '.[].id' | xargs -r stasis rm --yes`,
		Args:              usage(cobra.MinimumNArgs(1)),
		ValidArgsFunction: c.completeIDs,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			var removals []removalJSON
			for _, name := range args {
				r, err := resolve(cmd.Context(), st, name)
				if err != nil {
					return err
				}
				if r.State == store.Claimed {
					return fmt.Errorf("checkpoint %s is being restored; try again when that has ended: %w", r.ID, checkpoint.ErrBusy)
				}
				j := removalJSON{ID: r.ID, Reason: "asked for"}
				if m := r.Manifest; m != nil {
					j.Identity, j.SizeBytes = &m.Identity, m.Sizes.TotalBytes
				}
				removals = append(removals, j)
			}
			if dryRun {
				return c.printRemovals(removals, true)
			}
			if !yes && c.interactive() {
				for _, r := range removals {
					fmt.Fprintf(c.err, "%s  %s\n", r.ID, size(r.SizeBytes))
				}
				fmt.Fprintf(c.err, "Remove these %d checkpoints? [y/N] ", len(removals))
				answer, err := bufio.NewReader(c.in).ReadString('\n')
				if err != nil || !strings.EqualFold(strings.TrimSpace(answer), "y") {
					return errors.New("nothing was removed")
				}
			}
			for i := range removals {
				r := &removals[i]
				if err := st.Remove(cmd.Context(), r.ID); err != nil {
					return errors.Join(err, c.printRemovals(removals[:i], false))
				}
				r.Removed = true
				if err := c.tellRemoved(*r, "stasis rm"); err != nil {
					return err
				}
			}
			return c.printRemovals(removals, false)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be removed")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (c *cli) gcCommand() *cobra.Command {
	var p store.Policy
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove old checkpoints, now",
		Long: `gc removes checkpoints by age, number and size, as the daemon does every five
minutes with the limits that it was started with. Quarantined and corrupt ones
go first, then those with a newer successor, then the oldest. A claimed one is
never removed. It also removes what processes that died have left behind.`,
		Example: `  stasis gc --dry-run --ttl 24h
  stasis gc --ttl 0 --max-bytes 10737418240`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if p.TTL < 0 || p.MaxBytes < 0 || p.MaxCount < 0 || p.KeepPerIdentity < 0 {
				return usageError{errors.New("a limit must not be negative; 0 means none")}
			}
			st, err := c.open()
			if err != nil {
				return err
			}
			var sweepErr error
			if !dryRun {
				_, sweepErr = st.Sweep(cmd.Context())
			}
			removed, err := st.GC(cmd.Context(), p, dryRun)
			err = errors.Join(sweepErr, err)
			var removals []removalJSON
			for _, r := range removed {
				j := removalJSON{ID: r.ID, SizeBytes: r.SizeBytes, Reason: r.Reason, Removed: !dryRun}
				if r.Identity.Key != "" {
					j.Identity = &r.Identity
				}
				if !dryRun {
					err = errors.Join(err, c.tellRemoved(j, "stasis gc"))
				}
				removals = append(removals, j)
			}
			return errors.Join(err, c.printRemovals(removals, dryRun))
		},
	}
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "only say what would be removed")
	f.DurationVar(&p.TTL, "ttl", 72*time.Hour, "remove those that are older; 0 for no limit")
	f.Int64Var(&p.MaxBytes, "max-bytes", 0, "remove the oldest beyond this many bytes; 0 for no limit")
	f.IntVar(&p.MaxCount, "max-count", 0, "remove the oldest beyond this many; 0 for no limit")
	f.IntVar(&p.KeepPerIdentity, "keep", 0, "remove all but this many of one identity; 0 for no limit")
	return cmd
}
