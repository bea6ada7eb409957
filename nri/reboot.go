package nri

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"

	"github.com/stasis-containers/stasis/nri/eventlog"
)

// guardRetry is the time between two attempts to reach logind.
const guardRetry = 10 * time.Second

// rebootWatch follows the containers of the node manifest. It belongs to the
// main loop.
type rebootWatch struct {
	root, bootID string
	stamp        os.FileInfo // of the manifest that was read, good or bad; nil for none
	tracker      *reboot.Tracker
	records      []store.Record // as of before the last poll of the log
	listed       bool
	dirty        bool // there is news since the last report
	told         bool // it was said who is waited for
	settled      bool // and that nobody is any more
}

// load reads the manifest if it is another one than before, and what the log
// has said so far. It reports whether it is.
func (w *rebootWatch) load() (bool, error) {
	stamp, err := os.Lstat(filepath.Join(w.root, reboot.FileName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		changed := w.stamp != nil
		w.stamp, w.tracker = nil, nil
		return changed, nil
	case err != nil:
		return false, err
	case w.stamp != nil && os.SameFile(stamp, w.stamp) && stamp.ModTime().Equal(w.stamp.ModTime()) && stamp.Size() == w.stamp.Size():
		return false, nil
	}
	w.stamp, w.tracker = stamp, nil
	m, err := reboot.Load(fsys.OS{}, w.root)
	if errors.Is(err, fs.ErrNotExist) { // just removed
		w.stamp = nil
		return true, nil
	}
	if err != nil {
		return true, err
	}
	t := reboot.NewTracker(m)
	if err := eventlog.Read(w.root, t.Observe); err != nil {
		return true, err
	}
	w.tracker, w.listed, w.dirty, w.told, w.settled = t, false, true, false, false
	return true, nil
}

func (w *rebootWatch) observe(e event.Event) {
	if w.tracker != nil {
		w.tracker.Observe(e)
		w.dirty = true
	}
}

// list takes the store's records. The next report uses them, after another poll
// of the log: who is missing among them is in the log by then.
func (w *rebootWatch) list(records []store.Record) {
	w.records, w.listed, w.dirty = records, true, true
}

// followReboot brings the report of the last reboot up to date. The log has just
// been polled. It reports whether the store is to be listed again.
func (s *server) followReboot(ctx context.Context) (relist bool) {
	w := &s.reboot
	changed, err := w.load()
	if err != nil && changed {
		log.G(ctx).WithError(err).Error("the node manifest of the last reboot cannot be read; containers are restored as usual, but nobody can say which were expected")
	}
	var report *reboot.NodeReport
	switch {
	case w.tracker == nil && !changed, w.tracker != nil && (!w.listed || !w.dirty):
		return changed
	case w.tracker != nil:
		report = w.tracker.Report(w.bootID, w.records)
		w.dirty = false
		w.say(ctx, report)
	}
	s.metrics.reboot(report)
	s.mu.Lock()
	s.rebootReport = report
	s.rebootError = ""
	if err != nil {
		s.rebootError = err.Error()
	}
	s.mu.Unlock()
	return changed
}

// say tells of a node that came up again, at first and when all is settled.
func (w *rebootWatch) say(ctx context.Context, r *reboot.NodeReport) {
	if !r.Rebooted || w.settled {
		return
	}
	fields := log.Fields{"op": "reboot", "prepared_at": r.PreparedAt, "kernel_before": r.Kernel}
	for _, state := range reboot.States {
		fields[string(state)] = r.Counts[state]
	}
	if w.settled = r.Counts[reboot.Pending] == 0; w.settled {
		log.G(ctx).WithFields(fields).Info("the node has rebooted, and no container is waited for any more")
		return
	}
	if !w.told {
		w.told = true
		log.G(ctx).WithFields(fields).Info("the node has rebooted, and checkpoints wait for their containers")
	}
}

// guard holds up shutdowns of the node until its containers are dumped, where
// there is a logind.
func (s *server) guard(ctx context.Context) {
	if !s.config.InhibitShutdown {
		return
	}
	n := &reboot.Node{Root: s.config.Root, ContainerdState: s.config.ContainerdState, Kubelet: reboot.HostKubelet(s.config.KubeletUnit),
		Missed: func(context.Context) ([]reboot.Missed, error) { return s.plugin.allMissed(), nil }}
	told := false
	for ctx.Err() == nil {
		l, err := reboot.OpenLogind(ctx)
		if err == nil {
			told = false
			err = n.Guard(ctx, l, reboot.Options{})
			l.Close()
		}
		if ctx.Err() != nil {
			return
		}
		if entry := log.G(ctx).WithError(err); !told {
			entry.Warn("a shutdown does not wait for dumps; only the unit stasis-prepare-reboot makes them")
			told = true
		} else {
			entry.Debug("still no logind")
		}
		select {
		case <-ctx.Done():
		case <-time.After(guardRetry):
		}
	}
}
