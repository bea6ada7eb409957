package shim

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// errAbandoned ends a Snapshot whose caller went away.
var errAbandoned = errors.New("the caller went away")

// Snapshot implements [control.Server]. A stop signal that comes meanwhile
// waits for its end, SIGKILL ends it. A caller that goes away gets no template.
func (s *service) Snapshot(ctx context.Context, id, template string) (control.Result, error) {
	ctx = withFields(ctx, log.Fields{"container_id": id})
	r, err := s.snapshot(ctx, id, template)
	if err != nil {
		return control.Result{}, fmt.Errorf("template of container %s: %w", id, err)
	}
	return r, nil
}

func (s *service) snapshot(ctx context.Context, id, template string) (control.Result, error) {
	if err := checkpoint.ValidateTemplateName(template); err != nil {
		return control.Result{}, err
	}
	c, err := s.enrolled(ctx, id)
	if err != nil {
		return control.Result{}, err
	}
	if c.settings.Policy != checkpoint.PolicyTemplate && c.settings.Template == "" {
		return control.Result{}, fmt.Errorf("its pod is annotated neither with %s: %s nor with %s, and is not as clones are (%s): %w",
			checkpoint.AnnotationPolicy, checkpoint.PolicyTemplate, checkpoint.AnnotationTemplate, checkpoint.GenerationMount, errdefs.ErrFailedPrecondition)
	}
	state, err := s.running(ctx, c)
	if err != nil {
		return control.Result{}, err
	}
	job, life, deadline := s.newJob(ctx)
	if err := c.beginSnapshot(job, state); err != nil {
		job.cancel(nil)
		return control.Result{}, err
	}
	go func() { // ends with the dump
		defer job.cancel(nil)
		defer close(job.done)
		defer c.end()
		job.result, job.err = s.detached(life, deadline, c, int(state.Pid), dumpMode{template: template})
		// What the CRI call finds in this file it uses.
		if err := c.writeCRIUConfig(s.dumpOptions(c)); err != nil {
			log.G(life).WithError(err).Error("options of the next dump")
		}
		if job.err == nil {
			s.noteTemplate(life, c, template, job.result.CheckpointID)
			s.pruneTemplates(life)
		}
	}()
	select {
	case <-job.done:
		return job.result, job.err
	case <-ctx.Done():
		job.cancel(errAbandoned)
		return control.Result{}, ctx.Err()
	}
}

// Promote implements [control.Server].
func (s *service) Promote(ctx context.Context, id string) (control.Promotion, error) {
	ctx = withFields(ctx, log.Fields{"container_id": id})
	p, err := s.promote(ctx, id)
	if err != nil {
		return control.Promotion{}, fmt.Errorf("promote container %s: %w", id, err)
	}
	return p, nil
}

func (s *service) promote(ctx context.Context, id string) (control.Promotion, error) {
	c, err := s.enrolled(ctx, id)
	if errdefs.IsNotFound(err) {
		return control.Promotion{Skipped: "it is gone, or did not opt in"}, nil
	}
	if err != nil {
		return control.Promotion{}, err
	}
	c.mu.Lock()
	from, started, cg := c.restoredFrom, !c.startedAt.IsZero(), c.cgroup
	c.mu.Unlock()
	switch {
	case c.settings.Template == "":
		return control.Promotion{Skipped: "its pod names no template"}, nil
	case from != nil:
		return control.Promotion{Skipped: "it went on from checkpoint " + string(from.ID) + " itself"}, nil
	case started && cg != nil && !alive(cg):
		return control.Promotion{Skipped: "it has exited"}, nil
	}
	st, err := s.openStore()
	if err != nil {
		return control.Promotion{}, err
	}
	m, err := st.LatestTemplate(ctx, c.identity.Namespace, c.settings.Template)
	var corrupt *store.CorruptError // the next clone sets it aside
	if err != nil && !errors.Is(err, checkpoint.ErrNotFound) && !errors.As(err, &corrupt) {
		return control.Promotion{}, err
	}
	if err == nil && s.fits(c, m) {
		return control.Promotion{Result: control.Result{CheckpointID: m.ID, SizeBytes: m.Sizes.TotalBytes, Already: true}}, nil
	}
	r, err := s.snapshot(ctx, id, c.settings.Template)
	return control.Promotion{Result: r}, err
}

// fits tells whether another container like this one would begin from the
// template on this node, and as it wants to.
func (s *service) fits(c *container, m *checkpoint.Manifest) bool {
	if c.settings.Memory == checkpoint.MemoryMapped && !laidOut(m) {
		return false // of an older version
	}
	facts, err := criu.ReadHostFacts(filepath.Join(s.config.RuntimeDir, hostFactsFile))
	return err == nil && criu.CheckHost(m.Host, facts) == nil && m.ImageDigest == c.annotations[checkpoint.InternalImageDigest] &&
		len(m.Fingerprint.Diff(c.fingerprint)) == 0
}

// pruneTemplates removes what the new version replaces; what it cannot remove
// now, because a container is being created from it, the daemon sweeps.
func (s *service) pruneTemplates(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.config.CleanupTimeout)
	defer cancel()
	st, err := s.openStore()
	if err == nil {
		_, err = st.PruneTemplates(ctx)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("older versions of the template are left to the daemon")
	}
}

// beginSnapshot makes job the dump for a template, where nothing else holds the
// container.
func (c *container) beginSnapshot(job *dumpJob, state *taskAPI.StateResponse) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	other, err := c.preparableLocked()
	if other != nil {
		err = busyError(c.busy)
	}
	if err != nil {
		return err
	}
	c.busy, c.state, c.prepare = opSnapshot, state, job
	return nil
}

// claim takes the checkpoint that the daemon named, or pins the template.
func (s *service) claim(ctx context.Context, st *store.Store, c *container, id checkpoint.ID) (claim, error) {
	if c.annotations[checkpoint.InternalTemplateVersion] != "" {
		return s.pin(ctx, st, c, id)
	}
	claim, err := st.Claim(ctx, id, c.id)
	if err == nil {
		return claim, nil
	}
	var corrupt *store.CorruptError
	if errors.As(err, &corrupt) {
		err = errors.Join(err, st.Quarantine(ctx, id, err.Error(), nil))
	}
	return nil, err
}

// pin pins a version of the template. Where the daemon's is gone, a newer one
// took its place.
func (s *service) pin(ctx context.Context, st *store.Store, c *container, version checkpoint.ID) (claim, error) {
	r := store.TemplateRef{Namespace: c.identity.Namespace, Name: c.settings.Template, Version: version}
	var corrupt *store.CorruptError
	for range 3 {
		if err := s.clonedInVain(c, r.Version); err != nil {
			return nil, err
		}
		pin, err := st.PinTemplate(ctx, r, c.id)
		if err == nil {
			return pin, nil
		}
		if errors.As(err, &corrupt) {
			return nil, errors.Join(err, st.QuarantineTemplate(ctx, r, err.Error(), nil))
		}
		if !errors.Is(err, checkpoint.ErrNotFound) {
			return nil, err
		}
		m, err := st.LatestTemplate(ctx, r.Namespace, r.Name)
		if err != nil {
			return nil, err
		}
		r.Version = m.ID
	}
	return nil, fmt.Errorf("template %s: its versions are replaced faster than pinned: %w", r, checkpoint.ErrBusy)
}

// newGeneration tells a container, where it has the daemon's mount for that,
// that it is about to go on from a checkpoint.
func (s *service) newGeneration(c *container) error {
	dir, err := checkpoint.GenerationDir(s.config.RuntimeDir, c.id)
	if err != nil {
		return err
	}
	for _, m := range c.spec.Mounts {
		if m.Destination == checkpoint.GenerationMount && m.Source == dir {
			return checkpoint.NewGeneration(s.config.RuntimeDir, c.id)
		}
	}
	return nil
}

// cloneLife is how long a container lived that had begun from a template.
type cloneLife struct {
	version checkpoint.ID
	uptime  time.Duration
}

// noteClone remembers how long a clone lived, at most, which had ended by then. A shim
// lives as long as its sandbox, within which the kubelet restarts what fails.
func (s *service) noteClone(c *container, by time.Time) {
	c.mu.Lock()
	m, started := c.restoredFrom, c.startedAt
	c.mu.Unlock()
	if m == nil || m.Template == "" || started.IsZero() {
		return
	}
	s.rememberClone(c, m.ID, by.Sub(started))
}

func (s *service) rememberClone(c *container, version checkpoint.ID, uptime time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clones[c.identity.Container] = cloneLife{version, uptime}
}

// clonedInVain refuses a version from which the container began before in this
// sandbox and soon died: it would only do so again.
func (s *service) clonedInVain(c *container, version checkpoint.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.clones[c.identity.Container]; ok && l.version == version && l.uptime < s.config.MinUptime {
		return &restore.Refusal{Code: restore.CrashLooping, Err: fmt.Errorf("the container before it began from template %s@%s too and lived %v, less than %v",
			c.settings.Template, version, l.uptime.Round(time.Millisecond), s.config.MinUptime)}
	}
	return nil
}
