package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

const (
	// dumpSlots is how many dumps shims make at a time, see shim.DefaultConfig.
	dumpSlots = 2
	// speedBytes are written to measure the store's disk.
	speedBytes = 32 << 20
	// defaultBase is what a dump takes beside its bytes where no earlier one is
	// known: runc's and CRIU's start, the syncs.
	defaultBase = 500 * time.Millisecond
	// maxLayerFiles bounds the look at a writable layer.
	maxLayerFiles = 50000
	maxHistory    = 200
)

// prediction is what a dry run says of one container.
type prediction struct {
	Identity    checkpoint.Identity `json:"identity"`
	PodName     string              `json:"podName,omitempty"`
	ContainerID string              `json:"containerID"`
	State       control.State       `json:"state,omitempty"`
	MemoryBytes int64               `json:"memoryBytes"`
	LayerBytes  int64               `json:"layerBytes"`
	Millis      int64               `json:"predictedMillis"`
	// Problems keep it from being dumped; Warnings may.
	Problems []string `json:"problems,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

// predictionsJSON is the machine-readable form of a dry run.
type predictionsJSON struct {
	Containers   []prediction `json:"containers"`
	Bytes        int64        `json:"bytes"`
	FreeBytes    int64        `json:"freeBytes"`
	Millis       int64        `json:"predictedMillis"`
	DiskBytesSec int64        `json:"diskBytesPerSecond"`
	Kubelet      string       `json:"kubelet,omitempty"` // what runs of it
}

func (c *cli) predictReboot(ctx context.Context, n *reboot.Node, bestEffort bool) error {
	targets, err := n.Look(ctx)
	if err != nil {
		return err
	}
	all := predictionsJSON{Containers: []prediction{}}
	if all.Kubelet, err = n.Kubelet.Running(ctx); err != nil {
		all.Kubelet = err.Error()
	}
	if all.FreeBytes, err = (fsys.OS{}).FreeBytes(c.root); err != nil {
		return err
	}
	perSecond, err := diskSpeed(c.root, min(speedBytes, all.FreeBytes/4))
	if err != nil {
		return err
	}
	all.DiskBytesSec = int64(perSecond)
	base, err := baseTime(c.root, perSecond)
	if err != nil {
		return err
	}
	d := c.newDoctor()
	d.storeRoot = c.root
	bad, longest := 0, int64(0)
	for _, t := range targets {
		p := c.predict(t, d)
		if len(p.Problems) > 0 {
			bad++
		} else if p.State != control.Prepared {
			bytes := p.MemoryBytes + p.LayerBytes
			p.Millis = (base + time.Duration(float64(bytes)/perSecond*float64(time.Second))).Milliseconds()
			all.Bytes += bytes
			all.Millis += p.Millis
			longest = max(longest, p.Millis)
		}
		all.Containers = append(all.Containers, p)
	}
	all.Millis = max(longest, all.Millis/dumpSlots)
	if err := c.printPredictions(all); err != nil {
		return err
	}
	switch {
	case bestEffort:
	case bad > 0:
		return fmt.Errorf("%d of %d containers cannot be dumped", bad, len(targets))
	case all.Bytes+minSpace > all.FreeBytes:
		return fmt.Errorf("%s to write, %s free: %w", size(all.Bytes), size(all.FreeBytes), checkpoint.ErrNoSpace)
	}
	return nil
}

func (c *cli) printPredictions(all predictionsJSON) error {
	if c.output == "json" {
		return c.printJSON(all)
	}
	t := newTable(c.out, "CONTAINER", "POD", "STATE", "MEMORY", "LAYER", "TIME", "NOTE")
	for _, p := range all.Containers {
		name := p.ContainerID
		if p.Identity.Container != "" {
			name = p.Identity.String()
		}
		t.row(name, p.PodName, string(p.State), size(p.MemoryBytes), size(p.LayerBytes), millis(p.Millis), strings.Join(slices.Concat(p.Problems, p.Warnings), "; "))
	}
	if err := t.flush(); err != nil {
		return err
	}
	if all.Kubelet != "" {
		fmt.Fprintf(c.out, "The kubelet must be stopped: %s\n", clean(all.Kubelet))
	}
	_, err := fmt.Fprintf(c.out, "%d containers, at most %s in about %s; the store has %s free, its disk writes %s/s\n",
		len(all.Containers), size(all.Bytes), millis(all.Millis), size(all.FreeBytes), size(all.DiskBytesSec))
	return err
}

func millis(n int64) string { return (time.Duration(n) * time.Millisecond).String() }

func (c *cli) predict(t reboot.Target, d *doctor) prediction {
	p := prediction{Identity: t.Identity, PodName: t.PodName, ContainerID: t.ID, State: t.Status.State, MemoryBytes: t.Status.MemoryBytes}
	if t.Err != nil {
		p.Problems = append(p.Problems, t.Err.Error())
		return p
	}
	if t.Status.State == control.Prepared {
		p.Warnings = append(p.Warnings, "dumped and frozen already")
		return p
	}
	findings, err := d.container(strconv.Itoa(t.Status.PID))
	if err != nil {
		p.Warnings = append(p.Warnings, err.Error())
	}
	for _, f := range findings {
		text := strings.TrimPrefix(f.Check, "container: ") + ": " + f.Detail
		switch {
		case f.Check == "container: memory": // the sum of all counts
		case f.Level == levelFail:
			p.Problems = append(p.Problems, text)
		case f.Level == levelWarn:
			p.Warnings = append(p.Warnings, text)
		}
	}
	var whole bool
	if p.LayerBytes, whole, err = layerBytes(filepath.Join(t.Bundle, "rootfs")); err != nil {
		p.Warnings = append(p.Warnings, "writable layer: "+err.Error())
	} else if !whole {
		p.Warnings = append(p.Warnings, fmt.Sprintf("writable layer: more than %d files, only these were counted", maxLayerFiles))
	}
	return p
}

// layerBytes is the size of the overlay's writable layer, and whether all of it
// was counted.
func layerBytes(rootfs string) (n int64, whole bool, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(rootfs))
	if err != nil {
		return 0, false, err
	}
	upper := ""
	for _, m := range mounts {
		for _, o := range strings.Split(m.VFSOptions, ",") {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = dir
			}
		}
	}
	if upper == "" {
		return 0, false, errors.New("no overlay is mounted at its root")
	}
	files := 0
	err = filepath.WalkDir(upper, func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it runs on meanwhile
		}
		if err != nil {
			return err
		}
		if files++; files > maxLayerFiles {
			return fs.SkipAll
		}
		if fi, err := e.Info(); err == nil && fi.Mode().IsRegular() {
			if st, ok := fi.Sys().(*syscall.Stat_t); ok {
				n += st.Blocks * 512 // sparse files stay sparse
			} else {
				n += fi.Size()
			}
		}
		return nil
	})
	return n, files <= maxLayerFiles, err
}

// diskSpeed writes and syncs n bytes in the directory; the result is in bytes
// per second.
func diskSpeed(dir string, n int64) (float64, error) {
	f, err := os.CreateTemp(dir, ".trash-speed-") // the daemon sweeps what has such a name
	if err != nil {
		return 0, fmt.Errorf("measure the disk: %w", err)
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return 0, fmt.Errorf("measure the disk: %w", err)
	}
	buf := make([]byte, 1<<20)
	rand.Read(buf) // never fails; a disk must not compress it
	start := time.Now()
	var wrote int64
	for wrote < n {
		k, err := f.Write(buf)
		if err != nil {
			return 0, fmt.Errorf("measure the disk: %w", err)
		}
		wrote += int64(k)
	}
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("measure the disk: %w", err)
	}
	return float64(max(wrote, 1<<20)) / max(time.Since(start).Seconds(), 1e-6), nil
}

// baseTime is what the node's dumps so far took beside writing their bytes: the
// median of the last ones.
func baseTime(root string, perSecond float64) (time.Duration, error) {
	var base []time.Duration
	err := eventlog.Read(root, func(e event.Event) {
		if e.Type != event.Dumped || e.DurationMicros <= 0 {
			return
		}
		writing := time.Duration(float64(e.SizeBytes) / perSecond * float64(time.Second))
		base = append(base, max(0, time.Duration(e.DurationMicros)*time.Microsecond-writing))
		if len(base) > maxHistory {
			base = base[1:]
		}
	})
	if err != nil {
		return 0, err
	}
	if len(base) == 0 {
		return defaultBase, nil
	}
	slices.Sort(base)
	return base[len(base)/2], nil
}
