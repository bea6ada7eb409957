package reboot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

const (
	// statusTimeout bounds one question to a shim.
	statusTimeout = 10 * time.Second
	// settleTimeout is what is left for asking what became of a container whose
	// dump was not waited for, and for writing the manifest.
	settleTimeout = 5 * time.Second
	abortTimeout  = time.Minute
	// reserve must stay free in the store; it is what shims ask for as well.
	reserve = 64 << 20
)

// Node is what this package acts on.
type Node struct {
	Root            string // of the store, which must exist
	ContainerdState string // containerd's state directory
	Kubelet         Kubelet
	// Missed, if not nil, lists containers of opted-in pods whose bundles do not
	// say so. That it fails is logged: most nodes have none.
	Missed func(context.Context) ([]Missed, error)
}

// KubeletMode says what becomes of a kubelet that runs.
type KubeletMode int

const (
	RefuseKubelet KubeletMode = iota // fail with ErrKubelet
	StopKubelet                      // stop it, and note that for Abort
	IgnoreKubelet                    // do not even look
)

// Options of [Node.Prepare].
type Options struct {
	Kubelet KubeletMode
	// BestEffort: go on although the store has too little room for all.
	BestEffort bool
	// Kill ends the dumped containers after the manifest is written. It is for
	// a node that goes down for certain: systemd would wait 90 s for frozen
	// processes to heed SIGTERM. There is no Abort afterwards.
	Kill bool
	// Timeout bounds all of it but the writing of the manifest.
	Timeout time.Duration
	// Progress, if not nil, is told of each container that is done, one at a
	// time.
	Progress func(done, total int, e Entry)
}

// Target is a container with what its shim says of it.
type Target struct {
	Container
	Status control.Status
}

// Look finds the containers that would be prepared. Err of a target says why
// it would fail. Containers that do not run are left out.
func (n *Node) Look(ctx context.Context) ([]Target, error) {
	found, err := Find(ctx, n.ContainerdState)
	if err != nil {
		return nil, err
	}
	all := make([]Target, len(found), len(found)+8)
	var wg sync.WaitGroup
	for i, c := range found {
		all[i].Container = c
		if c.Err != nil {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, statusTimeout)
			defer cancel()
			t := &all[i]
			if t.Status, t.Err = t.Container.Status(ctx); t.Err != nil {
				t.Err = explain(t.Err)
			}
		})
	}
	wg.Wait()
	if n.Missed != nil {
		missed, err := n.Missed(ctx)
		if err != nil {
			log.G(ctx).WithError(err).Warn("whether containers were created without stasisd is not known")
		}
		for _, m := range StillThere(n.ContainerdState, missed) {
			all = append(all, Target{Container: m.container(n.ContainerdState)})
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var targets []Target
	for _, t := range all {
		if t.Err == nil && (t.Status.State == control.Stopped || t.Status.Settings.Policy == checkpoint.PolicyTemplate) {
			continue
		}
		if t.Err != nil {
			if _, err := os.Lstat(t.Bundle); errors.Is(err, fs.ErrNotExist) {
				continue // it ended meanwhile
			}
		}
		targets = append(targets, t)
	}
	return targets, nil
}

// explain says in an operator's words what a shim's answer means.
func explain(err error) error {
	switch {
	case errdefs.IsNotImplemented(err):
		return fmt.Errorf("its shim is of an older release and cannot prepare; create the pod again: %w", err)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("its shim did not opt it in, see stasis events: %w", err)
	}
	return err
}

// MemoryBytes is an upper bound of what dumps of the targets write for their
// processes.
func MemoryBytes(targets []Target) (sum int64) {
	for _, t := range targets {
		if t.Err == nil && t.Status.State != control.Prepared {
			sum += t.Status.MemoryBytes
		}
	}
	return sum
}

// Prepare dumps all opted-in containers and leaves them frozen, then writes the
// node manifest and returns it. That single containers fail is no error: see
// [Manifest.Complete].
//
// It refuses before anything is frozen: with ErrKubelet, or with
// [checkpoint.ErrNoSpace]. Where ctx ends in the middle, what is prepared stays
// so: the manifest is written, and returned with the cause.
func (n *Node) Prepare(ctx context.Context, o Options) (*Manifest, error) {
	m := &Manifest{FormatVersion: FormatVersion}
	var err error
	if m.BootID, err = checkpoint.BootID(); err != nil {
		return nil, err
	}
	if m.KernelRelease, err = kernelRelease(); err != nil {
		return nil, err
	}
	st, err := store.Open(fsys.OS{}, n.Root)
	if err != nil {
		return nil, err
	}
	work, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	lock, err := n.lock(work)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	old, err := Load(fsys.OS{}, n.Root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.G(ctx).WithError(err).Warn("the old node manifest is replaced")
	}
	if err != nil || old.BootID != m.BootID {
		old = &Manifest{}
	}
	m.StoppedKubelet = old.StoppedKubelet

	targets, err := n.Look(work)
	if err != nil {
		return nil, err
	}
	if err := n.room(targets); err != nil && !o.BestEffort {
		return nil, err
	}
	stopped, err := n.quiet(work, o.Kubelet)
	if err != nil {
		return nil, err
	}
	if stopped {
		m.StoppedKubelet = n.Kubelet.Unit()
		if targets, err = n.Look(work); err != nil { // it may have made more of them
			return nil, errors.Join(err, n.startKubelet(ctx))
		}
	}
	m.Containers = n.dumpAll(work, ctx, st, targets, o)
	m.keep(ctx, st, old)
	slices.SortStableFunc(m.Containers, func(a, b Entry) int { return cmp.Compare(a.Name(), b.Name()) })
	m.PreparedAt = time.Now().UTC()
	if err := save(fsys.OS{}, n.Root, m); err != nil {
		return m, err
	}
	if ctx.Err() != nil {
		return m, context.Cause(ctx)
	}
	if o.Kill {
		return m, kill(ctx, targets, m)
	}
	return m, nil
}

// lock excludes every other preparation or abort on this store.
func (n *Node) lock(ctx context.Context) (io.Closer, error) {
	path := filepath.Join(n.Root, lockName)
	if err := fsys.WriteFile(fsys.OS{}, path, nil); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("lock the node: %w", err)
	}
	l, err := fsys.OS{}.Lock(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("another preparation is in progress: %w", err)
	}
	return l, nil
}

func (n *Node) room(targets []Target) error {
	free, err := fsys.OS{}.FreeBytes(n.Root)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if need := MemoryBytes(targets) + reserve; need > free {
		return fmt.Errorf("the dumps may take %d MiB, and %s has %d MiB free: %w", need>>20, n.Root, free>>20, checkpoint.ErrNoSpace)
	}
	return nil
}

// quiet sees to it that no kubelet runs. It reports whether it stopped one.
func (n *Node) quiet(ctx context.Context, mode KubeletMode) (stopped bool, err error) {
	if mode == IgnoreKubelet {
		return false, nil
	}
	what, err := n.Kubelet.Running(ctx)
	if err == nil && what != "" && mode == StopKubelet {
		if err := n.Kubelet.Stop(ctx); err != nil {
			// Half of a stop helps nobody.
			return false, fmt.Errorf("%w: %w", ErrKubelet, errors.Join(err, n.startKubelet(ctx)))
		}
		stopped = true
		if what, err = n.Kubelet.Running(ctx); err != nil || what != "" {
			err = errors.Join(err, n.startKubelet(ctx))
		}
	}
	switch {
	case err != nil:
		return false, fmt.Errorf("%w, and whether it does cannot be told: %w", ErrKubelet, err)
	case what != "":
		return false, fmt.Errorf("%w while containers are frozen: %s", ErrKubelet, what)
	}
	return stopped, nil
}

func (n *Node) startKubelet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), statusTimeout)
	defer cancel()
	return n.Kubelet.Start(ctx)
}

// dumpAll prepares all targets at once: each shim freezes first, so that the
// node stands still as a whole, and then waits for one of the node's dump slots.
func (n *Node) dumpAll(work, caller context.Context, st *store.Store, targets []Target, o Options) []Entry {
	entries := make([]Entry, len(targets))
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := 0 // guarded by mu, as are calls of Progress
	for i := range targets {
		wg.Go(func() {
			e := targets[i].prepare(work, caller, st, o.Timeout)
			entries[i] = e
			mu.Lock()
			defer mu.Unlock()
			done++
			if o.Progress != nil {
				o.Progress(done, len(targets), e)
			}
		})
	}
	wg.Wait()
	return entries
}

func (t *Target) prepare(work, caller context.Context, st *store.Store, timeout time.Duration) Entry {
	e := Entry{Identity: t.Identity, PodName: t.PodName, PodUID: t.PodUID, ContainerID: t.ID, Result: Failed}
	start := time.Now()
	err := t.Err
	if err == nil {
		var r control.Result
		err = t.call(work, func(ctx context.Context, shim control.Client) error {
			r, err = shim.Prepare(ctx, t.ID)
			return err
		})
		if err == nil {
			e.CheckpointID, e.SizeBytes, e.Duration = r.CheckpointID, r.SizeBytes, r.Duration
		} else if work.Err() != nil {
			// The shim goes on without us, and may be done by now.
			err = fmt.Errorf("not dumped within %v: %w", timeout, err)
			if caller.Err() != nil {
				err = fmt.Errorf("interrupted: %w", context.Cause(caller))
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(caller), settleTimeout)
			defer cancel()
			if s, serr := t.Container.Status(ctx); serr == nil && s.State == control.Prepared {
				if m, merr := st.Manifest(ctx, s.CheckpointID); merr == nil {
					e.CheckpointID, e.SizeBytes, e.Duration, err = m.ID, m.Sizes.TotalBytes, time.Since(start), nil
				}
			}
		} else {
			err = explain(err)
		}
	}
	if err == nil && e.CheckpointID.IdentityHash() != e.Identity.Hash() {
		err = fmt.Errorf("checkpoint %s is of another identity: %w", e.CheckpointID, checkpoint.ErrInvalid)
	}
	if err != nil {
		e.Reason, e.CheckpointID, e.SizeBytes, e.Duration = err.Error(), "", 0, 0
		return e
	}
	e.Result = Dumped
	return e
}

// keep adds what an earlier preparation of this boot had dumped and which has
// died since, as long as its checkpoint is there.
func (m *Manifest) keep(ctx context.Context, st *store.Store, old *Manifest) {
	known := map[string]bool{}
	again := map[checkpoint.Identity]bool{}
	for _, e := range m.Containers {
		known[e.ContainerID], again[e.Identity] = true, true
	}
	for _, e := range old.Containers {
		if e.Result != Dumped || known[e.ContainerID] || again[e.Identity] {
			continue
		}
		if _, err := st.Manifest(ctx, e.CheckpointID); err == nil {
			m.Containers = append(m.Containers, e)
		}
	}
}

// Aborted says what an abort came to.
type Aborted struct {
	// Containers are all opted-in ones; Result is empty where it goes on, and
	// Failed where nobody knows.
	Containers []Entry `json:"containers"`
	// StartedKubelet is the unit that was started again, if any.
	StartedKubelet string `json:"startedKubelet,omitempty"`
	// Manifest: there was one of this boot, and it is removed.
	Manifest bool `json:"manifest"`
}

// Abort undoes a preparation of this boot, finished or not: it removes the node
// manifest, lets every container go on, and starts the kubelet if the
// preparation had stopped it. It does all it can and returns the errors joined.
func (n *Node) Abort(ctx context.Context) (*Aborted, error) {
	boot, err := checkpoint.BootID()
	if err != nil {
		return nil, err
	}
	lockCtx, cancel := context.WithTimeout(ctx, abortTimeout)
	defer cancel()
	lock, err := n.lock(lockCtx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	result := &Aborted{Containers: []Entry{}}
	unit, unwanted := "", true
	m, err := Load(fsys.OS{}, n.Root)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		unwanted = false
	case err != nil:
		log.G(ctx).WithError(err).Warn("the node manifest is removed unread")
	case m.BootID != boot:
		unwanted = false // the report of the last reboot
	default:
		unit, result.Manifest = m.StoppedKubelet, true
	}
	if unwanted {
		if err := remove(fsys.OS{}, n.Root); err != nil {
			return nil, err // nothing may go on before that
		}
	}
	found, err := Find(ctx, n.ContainerdState)
	if err != nil {
		return result, err
	}
	errs := make([]error, len(found))
	result.Containers = make([]Entry, len(found))
	var wg sync.WaitGroup
	for i, c := range found {
		wg.Go(func() {
			result.Containers[i], errs[i] = c.abort(ctx)
		})
	}
	wg.Wait()
	err = errors.Join(errs...)
	if unit != "" && ctx.Err() == nil {
		if kerr := n.startKubelet(ctx); kerr != nil {
			err = errors.Join(err, kerr)
		} else {
			result.StartedKubelet = unit
		}
	}
	return result, err
}

func (c *Container) abort(ctx context.Context) (Entry, error) {
	e := Entry{Identity: c.Identity, PodName: c.PodName, PodUID: c.PodUID, ContainerID: c.ID}
	err := c.Err
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, abortTimeout)
		defer cancel()
		err = c.call(ctx, func(ctx context.Context, shim control.Client) error { return shim.Abort(ctx, c.ID) })
		if errdefs.IsNotImplemented(err) || errdefs.IsNotFound(err) {
			err = nil // it can never have been prepared
		}
		if _, lerr := os.Lstat(c.Bundle); errors.Is(lerr, fs.ErrNotExist) {
			err = nil // it has ended
		}
	}
	if err != nil {
		e.Result, e.Reason = Failed, err.Error()
		return e, fmt.Errorf("container %s: %w", e.Name(), err)
	}
	return e, nil
}
