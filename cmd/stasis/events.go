package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

var eventTypes = []event.Type{event.Dumped, event.DumpFailed, event.Restored, event.ColdStart, event.RestoreFail,
	event.Quarantined, event.Ignored, event.Removed, event.PromoteFail}

// eventFilter says which events are shown.
type eventFilter struct {
	since     time.Time
	types     []string
	container string
}

func (f eventFilter) match(e event.Event) bool {
	if e.Time.Before(f.since) || len(f.types) > 0 && !slices.Contains(f.types, string(e.Type)) {
		return false
	}
	if f.container == "" || len(f.container) >= 8 && strings.HasPrefix(e.ContainerID, f.container) {
		return true
	}
	i := e.Identity
	return i != nil && (i.Container == f.container || i.Key == f.container || i.String() == f.container) || e.PodName == f.container
}

// followInterval is how often the log is looked at.
const followInterval = 200 * time.Millisecond

func (c *cli) eventsCommand() *cobra.Command {
	var f eventFilter
	var since string
	var follow bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Tell what happened to containers, and why",
		Long: `events shows the node's log: each dump, restore, cold start in spite of a
checkpoint, refusal and removal, with its reason. The log holds the latest 16 to
32 MiB. With --output json, each event is a line of its own.

Types:
  dumped          a checkpoint was committed
  dump-failed     the container got its stop signal instead
  restored        a container goes on from a checkpoint
  cold-start      there was a checkpoint, but it was not used
  restore-failed  the start was made to fail, as the pod asked for; or the
                  container was killed because its memory could not be filled;
                  or, with the code "aborted", who asked for the start did not
                  wait for its end, and the next start restores
  quarantined     a checkpoint was set aside
  ignored         an annotation was refused
  removed         a checkpoint was removed
  promote-failed  a container did not become a template, and runs on`,
		Example: `  stasis events --since 1h
  stasis events --follow --type dump-failed --type cold-start
  stasis events --container default/db-0/postgres -o json`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, t := range f.types {
				if !slices.Contains(eventTypes, event.Type(t)) {
					return usageError{fmt.Errorf("--type %q: there is no such type of event", t)}
				}
			}
			var err error
			if f.since, err = parseSince(since, time.Now()); err != nil {
				return usageError{err}
			}
			if _, err := c.open(); err != nil {
				return err
			}
			if follow {
				return c.follow(cmd.Context(), f)
			}
			t := newTable(c.out)
			if c.output == "table" {
				t.row(eventHead...)
			}
			var failed error
			err = eventlog.Read(c.root, func(e event.Event) {
				switch {
				case !f.match(e) || failed != nil:
				case c.output == "json":
					failed = json.NewEncoder(c.out).Encode(e)
				default:
					t.row(eventRow(e)...)
				}
			})
			if err == nil {
				err = failed
			}
			if err != nil {
				return err
			}
			return t.flush()
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&follow, "follow", "f", false, "go on with what happens from now on")
	fl.StringVar(&since, "since", "", "only events since then: a duration such as 30m, or a time such as 2026-01-02T15:04:05Z")
	fl.StringSliceVar(&f.types, "type", nil, "only events of this type; may be repeated")
	fl.StringVar(&f.container, "container", "", "only those of this container: its name, its ID or the first 8 digits of it, the pod's name, the key, or namespace/key/container")
	var names []string
	for _, t := range eventTypes {
		names = append(names, string(t))
	}
	if err := cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag is defined above
	}
	return cmd
}

// parseSince reads a duration before now or a time.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("--since %q: want a duration such as 30m, or a time such as 2026-01-02T15:04:05Z", s)
}

var eventHead = []string{"AGE", "TYPE", "CONTAINER", "CHECKPOINT", "SIZE", "TOOK", "REASON"}

func eventRow(e event.Event) []string {
	row := []string{age(e.Time), string(e.Type), e.ContainerID, string(e.CheckpointID), "", "", e.Reason}
	if e.Identity != nil {
		row[2] = e.Identity.String()
	}
	if e.SizeBytes > 0 {
		row[4] = size(e.SizeBytes)
	}
	if e.DurationMicros > 0 {
		row[5] = micros(e.DurationMicros)
	}
	if e.ReasonCode != "" {
		row[6] = strings.TrimSpace(e.ReasonCode + ": " + e.Reason)
	}
	return row
}

// follow prints events until ctx ends: those that match of the log so far if a
// time was given, and those that come.
func (c *cli) follow(ctx context.Context, f eventFilter) error {
	t, err := eventlog.NewTailer(c.root, !f.since.IsZero())
	if err != nil {
		return err
	}
	defer t.Close()
	tick := time.NewTicker(followInterval)
	defer tick.Stop()
	for {
		var failed error
		err := t.Poll(func(e event.Event) {
			if !f.match(e) || failed != nil {
				return
			}
			if c.output == "json" {
				failed = json.NewEncoder(c.out).Encode(e)
				return
			}
			row := eventRow(e)
			row[0] = e.Time.Local().Format("15:04:05") // an age would not stay true
			_, failed = fmt.Fprintln(c.out, strings.ReplaceAll(clean(fmt.Sprintf("%s  %-14s  %s  %s  %s", row[0], row[1], row[2], row[3], row[6])), "\n", " "))
		})
		if err == nil {
			err = failed
		}
		if err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
