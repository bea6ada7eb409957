package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// parts are what inspect shows of the images.
type parts struct{ processes, mappings, files, sockets bool }

func (c *cli) inspectCommand() *cobra.Command {
	var p parts
	cmd := &cobra.Command{
		Use:   "inspect ID",
		Short: "Show what a checkpoint holds",
		Long: `inspect shows the manifest of a checkpoint and what CRIU's images hold: the
processes with their memory mappings and open files, and the sockets. With one
or more of the flags it shows only those parts of the images.

It reads the images but not the memory itself, and checks no checksums; that is
what stasis verify does.`,
		Example: `  stasis inspect 0123456789abcdef-20260102T150405-89abcdef
  stasis inspect 0123 --processes --sockets
  stasis inspect 0123 -o json | jq '.images.processes[].comm'`,
		Args:              usage(cobra.ExactArgs(1)),
		ValidArgsFunction: c.completeIDs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if p == (parts{}) {
				p = parts{true, true, true, true}
			}
			st, err := c.open()
			if err != nil {
				return err
			}
			r, err := resolve(cmd.Context(), st, args[0])
			if err != nil {
				return err
			}
			return c.inspect(r, p)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&p.processes, "processes", false, "show the processes")
	f.BoolVar(&p.mappings, "mappings", false, "show the memory mappings")
	f.BoolVar(&p.files, "files", false, "show the open files")
	f.BoolVar(&p.sockets, "sockets", false, "show the sockets")
	return cmd
}

// inspect shows a record and what its images hold.
func (c *cli) inspect(r store.Record, p parts) (err error) {
	report, imageErr := criu.Inspect(filepath.Join(r.Path, checkpoint.ImageDir))
	if report != nil {
		p.filter(report)
	}
	if c.output == "json" {
		out := struct {
			recordJSON
			Mapped      *mappedJSON  `json:"mapped,omitempty"`
			Images      *criu.Report `json:"images,omitempty"`
			ImagesError string       `json:"imagesError,omitempty"`
		}{recordJSON: toJSON(r), Mapped: mappedMemory(r), Images: report}
		if imageErr != nil {
			out.ImagesError = imageErr.Error()
		}
		err = c.printJSON(out)
	} else {
		if err = c.printRecord(r); err == nil && report != nil {
			err = c.printReport(report, p)
		}
	}
	if imageErr != nil {
		err = errors.Join(err, fmt.Errorf("checkpoint %s: %w", r.ID, imageErr))
	}
	return err
}

// mappedJSON is what of a template's memory its clones can map, or why they cannot.
type mappedJSON struct {
	Bytes    uint64 `json:"bytes"`
	Segments int    `json:"segments"` // mappings
	Reason   string `json:"reason,omitempty"`
}

// mappedMemory is nil for what is no template.
func mappedMemory(r store.Record) *mappedJSON {
	if r.Manifest == nil || r.Manifest.Template == "" {
		return nil
	}
	m, err := criu.OpenMappedMemory(filepath.Join(r.Path, checkpoint.MappedDir))
	if err != nil {
		return &mappedJSON{Reason: strings.TrimSuffix(err.Error(), ": "+errdefs.ErrNotImplemented.Error())}
	}
	return &mappedJSON{Bytes: m.Bytes, Segments: m.Segments}
}

func (m *mappedJSON) String() string {
	if m.Reason != "" {
		return "not possible: " + m.Reason
	}
	return fmt.Sprintf("%s in %d mappings", size(int64(m.Bytes)), m.Segments)
}

func (p parts) filter(r *criu.Report) {
	for i := range r.Processes {
		if !p.mappings {
			r.Processes[i].Mappings = nil
		}
		if !p.files {
			r.Processes[i].Files = nil
		}
	}
	if !p.sockets {
		r.Sockets = nil
	}
	if !p.processes && !p.mappings && !p.files {
		r.Processes = nil
	}
}

func (c *cli) printRecord(r store.Record) error {
	t := newTable(c.out)
	t.row("ID:", string(r.ID))
	state := string(r.State)
	if r.Reason != "" {
		state += ": " + r.Reason
	}
	t.row("State:", state)
	t.row("Path:", r.Path)
	if r.Owner != nil {
		t.row("Claimed by:", fmt.Sprintf("process %d, for container %s", r.Owner.PID, r.Owner.ContainerID))
	}
	if r.Err != nil {
		t.row("Error:", r.Err.Error())
	}
	if m := r.Manifest; m != nil {
		t.row("Identity:", m.Identity.String())
		if m.Template != "" {
			t.row("Template:", m.Identity.Namespace+"/"+m.Template)
			t.row("Mapped memory:", mappedMemory(r).String())
		}
		t.row("Created:", m.CreatedAt.UTC().Format("2006-01-02 15:04:05 UTC")+" ("+age(m.CreatedAt)+" ago)")
		t.row("Pod:", m.PodName+" "+m.PodUID)
		t.row("Container:", m.ContainerID)
		t.row("Image:", strings.TrimSpace(m.ImageName+" "+m.ImageDigest))
		t.row("Host name:", m.Hostname)
		t.row("Policy:", fmt.Sprintf("%s, on failure %s, TCP %s", m.Settings.Policy, m.Settings.OnFailure, m.Settings.TCP))
		from := "cold start"
		if m.RestoredFrom != "" {
			from = "restored from " + string(m.RestoredFrom)
		}
		t.row("Generation:", fmt.Sprintf("%d, %s, up for %s", m.Generation, from, micros(m.UptimeMillis*1000)))
		t.row("Dumped on:", fmt.Sprintf("%s, kernel %s, CRIU %s, cgroup %s", m.Host.Arch, m.Host.KernelRelease, m.Host.CRIUVersion, m.Host.CgroupMode))
		t.row("Size:", fmt.Sprintf("%s (memory images %s, writable layer %s, volumes %s)", size(m.Sizes.TotalBytes), size(m.Sizes.MemoryBytes), size(m.Sizes.LayerBytes), size(m.Sizes.VolumeBytes)))
		d := m.Timings
		t.row("Time taken:", fmt.Sprintf("freeze %s, CRIU %s (frozen by it %s), copy %s, fsync %s, commit %s",
			micros(d.FreezeMicros), micros(d.CRIUMicros), micros(d.FrozenMicros), micros(d.CopyMicros), micros(d.FsyncMicros), micros(d.CommitMicros)))
		for _, v := range m.Volumes {
			t.row("Volume:", v.Destination)
		}
		for _, l := range m.Lost {
			t.row("Not saved:", l)
		}
	}
	return t.flush()
}

func (c *cli) printReport(r *criu.Report, p parts) error {
	section := func(name string, head ...string) *table {
		fmt.Fprintf(c.out, "\n%s\n", name)
		return newTable(c.out, head...)
	}
	if p.processes {
		t := section("Processes", "PID", "PPID", "COMMAND", "STATE", "THREADS", "UID:GID", "MEMORY", "EXECUTABLE")
		depth := map[uint32]int{}
		for _, q := range r.Processes {
			d, ok := depth[q.PPID]
			if ok {
				d++
			}
			depth[q.PID] = d
			t.row(strconv.Itoa(int(q.PID)), strconv.Itoa(int(q.PPID)), strings.Repeat("  ", min(d, 20))+q.Comm, q.State, strconv.Itoa(len(q.Threads)),
				fmt.Sprintf("%d:%d", q.UID, q.GID), size(int64(q.ResidentBytes)), q.Exe)
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	if p.mappings {
		t := section("Mappings", "PID", "START", "END", "PROT", "SIZE", "IN IMAGES", "KIND", "PATH")
		for _, q := range r.Processes {
			for _, m := range q.Mappings {
				t.row(strconv.Itoa(int(q.PID)), fmt.Sprintf("%012x", m.Start), fmt.Sprintf("%012x", m.End), m.Prot,
					size(int64(m.SizeBytes)), size(int64(m.ResidentBytes)), m.Kind, m.Path)
			}
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	if p.files {
		t := section("Open files", "PID", "FD", "TYPE", "OFFSET", "PATH")
		for _, q := range r.Processes {
			for _, f := range q.Files {
				name := f.Path
				if f.Unlinked {
					name += " (deleted)"
				}
				t.row(strconv.Itoa(int(q.PID)), strconv.Itoa(int(f.FD)), f.Type, strconv.FormatUint(f.Offset, 10), name)
			}
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	if p.sockets {
		t := section("Sockets", "PROTOCOL", "TYPE", "STATE", "LOCAL", "REMOTE")
		for _, s := range r.Sockets {
			t.row(s.Protocol, s.Type, s.State, s.Local, s.Remote)
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	return nil
}
