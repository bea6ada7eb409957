package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/nri"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// maxStatus bounds what is accepted as the daemon's answer.
const maxStatus = 32 << 20

// daemonStatus asks the daemon about itself.
func daemonStatus(ctx context.Context, runtimeDir string) (*nri.Status, error) {
	socket := filepath.Join(runtimeDir, nri.SocketName)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://stasisd/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("stasisd does not answer at %s; is it running? %w", socket, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("stasisd answered %s", resp.Status)
	}
	var s nri.Status
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatus)).Decode(&s); err != nil {
		return nil, fmt.Errorf("stasisd's answer: %w", err)
	}
	return &s, nil
}

// missed asks the daemon which containers of opted-in pods are ordinary ones.
func (c *cli) missed(ctx context.Context) ([]reboot.Missed, error) {
	s, err := daemonStatus(ctx, c.runtimeDir)
	if err != nil {
		return nil, err
	}
	return s.Missed, nil
}

func (c *cli) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Ask the daemon how it is",
		Long: `status asks stasisd whether it is connected to containerd, how many pods it
knows and what is in the store. It fails if stasisd does not answer.

Once the node was prepared for a reboot it tells of each container, until the
next preparation:
  pending   its checkpoint waits for it
  restored  it goes on
  cold      it began anew, and why
  expired   it did not come back while its checkpoint was kept
  failed    it was not dumped, and why`,
		Example: `  stasis status
  curl --unix-socket /run/stasis/stasisd.sock http://stasis/metrics`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := daemonStatus(cmd.Context(), c.runtimeDir)
			if err != nil {
				return err
			}
			if c.output == "json" {
				return c.printJSON(s)
			}
			t := newTable(c.out)
			t.row("Version:", s.Version)
			t.row("Up since:", s.StartedAt.Local().Format(time.DateTime)+" ("+age(s.StartedAt)+")")
			runtime := s.Runtime
			if !s.Connected {
				runtime = "not connected: containers that are created now are ordinary ones"
			}
			t.row("Runtime:", runtime)
			t.row("Pods:", strconv.Itoa(s.Pods))
			t.row("Host facts:", s.HostFacts)
			t.row("Store:", s.Root)
			for _, state := range []store.State{store.Committed, store.Claimed, store.Quarantined, store.Corrupt} {
				t.row("  "+string(state)+":", strconv.Itoa(s.Store.Checkpoints[state]))
			}
			t.row("  size:", size(s.Store.Bytes))
			t.row("  free:", size(s.Store.FreeBytes))
			if g := s.LastGC; g != nil {
				last := fmt.Sprintf("%s ago, removed %d, %s", age(g.Time), g.Removed, size(g.SizeBytes))
				if g.Error != "" {
					last += ", " + g.Error
				}
				t.row("Last gc:", last)
			}
			if err := t.flush(); err != nil {
				return err
			}
			if err := c.printMissed(s.Missed); err != nil {
				return err
			}
			return c.printReboot(s)
		},
	}
}

// printMissed tells of opted-in containers that stasis cannot dump.
func (c *cli) printMissed(missed []reboot.Missed) error {
	if len(missed) == 0 {
		return nil
	}
	fmt.Fprint(c.out, "\nCreated while stasisd was not connected, and not dumped until they are created again:\n")
	t := newTable(c.out, "CONTAINER", "POD", "CONTAINER ID")
	for _, m := range missed {
		t.row(m.Identity.String(), m.PodName, m.ContainerID)
	}
	return t.flush()
}

// printReboot tells of the last preparation for a reboot, if there was one.
func (c *cli) printReboot(s *nri.Status) error {
	if s.RebootError != "" {
		_, err := fmt.Fprintf(c.out, "\nReboot: %s\n", clean(s.RebootError))
		return err
	}
	r := s.Reboot
	if r == nil {
		return nil
	}
	what := "the node has not rebooted since"
	if r.Rebooted {
		what = "the node has rebooted since"
	}
	fmt.Fprintf(c.out, "\nReboot: prepared %s ago under kernel %s; %s\n", age(r.PreparedAt), clean(r.Kernel), what)
	var counts []string
	for _, state := range reboot.States {
		if n := r.Counts[state]; n > 0 {
			counts = append(counts, fmt.Sprintf("%d %s", n, state))
		}
	}
	if len(counts) > 0 {
		fmt.Fprintln(c.out, "Containers:", strings.Join(counts, ", "))
	}
	if len(r.Containers) == 0 {
		return nil
	}
	t := newTable(c.out, "CONTAINER", "POD", "STATE", "SIZE", "REASON")
	for _, e := range r.Containers {
		t.row(e.Name(), e.PodName, string(e.State), size(e.SizeBytes), e.Reason)
	}
	return t.flush()
}
