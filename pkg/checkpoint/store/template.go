package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const (
	templatesDir = "templates"
	pinSuffix    = ".pin"
)

// TemplateRef names one version of a template.
type TemplateRef struct {
	Namespace string        `json:"namespace"`
	Name      string        `json:"name"`
	Version   checkpoint.ID `json:"version"`
}

// String is "namespace/name@version".
func (r TemplateRef) String() string { return r.Namespace + "/" + r.Name + "@" + string(r.Version) }

func (r TemplateRef) validate() error {
	if err := validateTemplate(r.Namespace, r.Name); err != nil {
		return err
	}
	return checkID(r.Version)
}

// validateTemplate keeps names that are no DNS labels out of paths.
func validateTemplate(namespace, name string) error {
	if err := checkpoint.ValidateTemplateName(namespace); err != nil {
		return fmt.Errorf("namespace of the template: %w", err)
	}
	if err := checkpoint.ValidateTemplateName(name); err != nil {
		return fmt.Errorf("template: %w", err)
	}
	return nil
}

func (s *Store) versionPath(r TemplateRef) string {
	return s.path(templatesDir, r.Namespace, r.Name, string(r.Version))
}

// place is where a checkpoint belongs once it is committed.
func (s *Store) place(m *checkpoint.Manifest) string {
	if m.Template == "" {
		return s.committedPath(m.ID)
	}
	return s.versionPath(TemplateRef{m.Identity.Namespace, m.Template, m.ID})
}

// mkdirPlace makes the directories above a template's version. They are never
// removed, so that no commit finds them gone again.
func (s *Store) mkdirPlace(place string) error {
	name := filepath.Dir(place)
	namespace := filepath.Dir(name)
	if filepath.Dir(namespace) != s.path(templatesDir) {
		return nil
	}
	if err := s.mkdir(namespace); err != nil {
		return err
	}
	return s.mkdir(name)
}

// Template is one version of a template in a list.
type Template struct {
	TemplateRef
	Path string
	// Newest: new clones begin from this one.
	Newest bool
	// Manifest is nil where Err says why.
	Manifest *checkpoint.Manifest
	Pins     []Owner // of living processes, where they can be read
	Err      error
}

// versions lists the versions of a template by time, the newest last. Those of
// one second are in the order of their manifests' times.
func (s *Store) versions(namespace, name string) ([]Template, error) {
	dir := s.path(templatesDir, namespace, name)
	entries, err := s.fs.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []Template
	pins := map[checkpoint.ID][]Owner{}
	for _, e := range entries {
		if id, ok := pinned(e.Name()); ok {
			if o, alive, err := s.owner(filepath.Join(dir, e.Name())); err == nil && alive && o != nil {
				pins[id] = append(pins[id], *o)
			}
			continue
		}
		id, err := checkpoint.ParseID(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		t := Template{TemplateRef: TemplateRef{namespace, name, id}, Path: filepath.Join(dir, e.Name())}
		t.Manifest, t.Err = s.readVersion(t.TemplateRef)
		if !errors.Is(t.Err, checkpoint.ErrNotFound) { // gone since
			all = append(all, t)
		}
	}
	slices.SortFunc(all, func(a, b Template) int {
		n := cmp.Compare(a.Version[17:32], b.Version[17:32])
		if n == 0 && a.Manifest != nil && b.Manifest != nil {
			n = a.Manifest.CreatedAt.Compare(b.Manifest.CreatedAt)
		}
		return cmp.Or(n, cmp.Compare(a.Version, b.Version))
	})
	for i := range all {
		all[i].Newest, all[i].Pins = i == len(all)-1, pins[all[i].Version]
	}
	return all, nil
}

func (s *Store) readVersion(r TemplateRef) (*checkpoint.Manifest, error) {
	m, err := s.readManifest(s.versionPath(r), r.Version)
	if err == nil && (m.Template != r.Name || m.Identity.Namespace != r.Namespace) {
		return nil, &CorruptError{r.Version, fmt.Errorf("manifest is that of template %s/%s: %w", m.Identity.Namespace, m.Template, checkpoint.ErrCorrupt)}
	}
	return m, err
}

// LatestTemplate is the manifest of the template's newest version. Errors:
// [checkpoint.ErrInvalid] for names that are none, [checkpoint.ErrNotFound], a
// [CorruptError] that names the version if its manifest cannot be read.
func (s *Store) LatestTemplate(_ context.Context, namespace, name string) (*checkpoint.Manifest, error) {
	if err := validateTemplate(namespace, name); err != nil {
		return nil, err
	}
	all, err := s.versions(namespace, name)
	if err != nil {
		return nil, fmt.Errorf("template %s/%s: %w", namespace, name, err)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("template %s/%s: %w", namespace, name, checkpoint.ErrNotFound)
	}
	t := all[len(all)-1]
	return t.Manifest, t.Err
}

// Templates lists all versions of all templates, sorted by namespace, name and
// time. What has no template's name is left out.
func (s *Store) Templates(ctx context.Context) ([]Template, error) {
	var all []Template
	err := s.eachTemplate(ctx, func(namespace, name string) error {
		v, err := s.versions(namespace, name)
		all = append(all, v...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	return all, nil
}

func (s *Store) eachTemplate(ctx context.Context, f func(namespace, name string) error) error {
	namespaces, err := s.fs.ReadDir(s.path(templatesDir))
	if err != nil {
		return err
	}
	for _, ns := range namespaces {
		names, err := s.fs.ReadDir(s.path(templatesDir, ns.Name()))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			continue
		}
		if err != nil {
			return err
		}
		for _, n := range names {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if !n.IsDir() || validateTemplate(ns.Name(), n.Name()) != nil {
				continue
			}
			if err := f(ns.Name(), n.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// VerifyTemplate is [Store.Verify] of a template's version.
func (s *Store) VerifyTemplate(ctx context.Context, r TemplateRef) error {
	if err := r.validate(); err != nil {
		return err
	}
	if _, err := s.readVersion(r); err != nil {
		return err
	}
	return s.verify(ctx, s.versionPath(r), r.Version, false, nil)
}

// RemoveTemplate removes a version, for good once it returns. Errors:
// [checkpoint.ErrNotFound], [checkpoint.ErrBusy] while a container is being
// created from it.
func (s *Store) RemoveTemplate(ctx context.Context, r TemplateRef) error {
	if err := r.validate(); err != nil {
		return err
	}
	trash, err := s.removeVersion(ctx, r)
	if err != nil {
		return fmt.Errorf("remove template %s: %w", r, err)
	}
	s.removeTrash(ctx, trash)
	return nil
}

func (s *Store) removeVersion(ctx context.Context, r TemplateRef) (trash string, err error) {
	l, err := s.lock(ctx, r.Version)
	if err != nil {
		return "", err
	}
	defer l.Close()
	if err := s.unpinned(r); err != nil {
		return "", err
	}
	trash, err = s.trash(s.versionPath(r))
	if errors.Is(err, fs.ErrNotExist) {
		return "", checkpoint.ErrNotFound
	}
	return trash, err
}

// pinned tells of which version a file with this name is a pin.
func pinned(name string) (checkpoint.ID, bool) {
	name, ok := strings.CutSuffix(name, pinSuffix)
	i := strings.LastIndexByte(name, '-')
	if !ok || i < 0 {
		return "", false
	}
	id, err := checkpoint.ParseID(name[:i])
	return id, err == nil
}

// unpinned removes the pins that dead processes left, and fails with ErrBusy if
// a living one has one. The lock is held.
func (s *Store) unpinned(r TemplateRef) error {
	dir := filepath.Dir(s.versionPath(r))
	entries, err := s.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if id, ok := pinned(e.Name()); !ok || id != r.Version {
			continue
		}
		pin := filepath.Join(dir, e.Name())
		o, alive, err := s.owner(pin)
		switch {
		case err != nil:
			return err
		case alive && o == nil:
			return fmt.Errorf("in use, by whom cannot be read: %w", checkpoint.ErrBusy)
		case alive:
			return fmt.Errorf("process %d creates container %q from it: %w", o.PID, o.ContainerID, checkpoint.ErrBusy)
		}
		if err := s.fs.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// PruneTemplates removes the versions that have a readable successor and that
// nobody uses, and the pins that dead processes left. It goes on after errors
// and returns them joined, with the versions that it did remove.
func (s *Store) PruneTemplates(ctx context.Context) ([]TemplateRef, error) {
	var removed []TemplateRef
	var errs []error
	err := s.eachTemplate(ctx, func(namespace, name string) error {
		entries, err := s.fs.ReadDir(s.path(templatesDir, namespace, name))
		if err != nil {
			return err
		}
		all, err := s.versions(namespace, name)
		if err != nil {
			return err
		}
		for i, t := range all {
			if i == len(all)-1 || all[len(all)-1].Err != nil {
				break
			}
			err := s.RemoveTemplate(ctx, t.TemplateRef)
			switch {
			case err == nil:
				removed = append(removed, t.TemplateRef)
			case !errors.Is(err, checkpoint.ErrBusy) && !errors.Is(err, checkpoint.ErrNotFound):
				errs = append(errs, err)
			}
		}
		for _, e := range entries {
			if id, ok := pinned(e.Name()); ok {
				errs = append(errs, s.dropStalePins(ctx, TemplateRef{namespace, name, id}))
			}
		}
		return nil
	})
	if err := errors.Join(append(errs, err)...); err != nil {
		return removed, fmt.Errorf("prune templates: %w", err)
	}
	return removed, nil
}

func (s *Store) dropStalePins(ctx context.Context, r TemplateRef) error {
	l, err := s.lock(ctx, r.Version)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := s.unpinned(r); !errors.Is(err, checkpoint.ErrBusy) {
		return err
	}
	return nil
}

// QuarantineTemplate is [Store.Quarantine] of a version: it is a template no
// more, and the one before it, if there still is one, the newest.
func (s *Store) QuarantineTemplate(ctx context.Context, r TemplateRef, reason string, logs map[string][]byte) error {
	if err := r.validate(); err != nil {
		return err
	}
	l, err := s.lock(ctx, r.Version)
	if err != nil {
		return fmt.Errorf("quarantine template %s: %w", r, err)
	}
	defer l.Close()
	if err := s.quarantine(s.versionPath(r), r.Version, reason, logs); err != nil {
		return fmt.Errorf("quarantine template %s: %w", r, err)
	}
	return nil
}

// Pin keeps a version of a template from being removed while a container is
// created from it. Any number of processes may have one. It has the methods of
// [Claim], but none of them uses the template up. A pin ends with the first
// success of Release, Consume or Quarantine, and with its process.
type Pin struct {
	s        *Store
	ref      TemplateRef
	file     string
	manifest *checkpoint.Manifest

	mu    sync.Mutex
	ended bool // guarded by mu
}

// PinTemplate pins a version on behalf of the container. Errors:
// [checkpoint.ErrNotFound], a [CorruptError] if its manifest is damaged.
func (s *Store) PinTemplate(ctx context.Context, r TemplateRef, containerID string) (*Pin, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	l, err := s.lock(ctx, r.Version)
	if err != nil {
		return nil, fmt.Errorf("pin template %s: %w", r, err)
	}
	defer l.Close()
	m, err := s.readVersion(r)
	if err != nil {
		return nil, err
	}
	p := &Pin{s: s, ref: r, manifest: m, file: s.versionPath(r) + "-" + randomName() + pinSuffix}
	if err := s.writePin(p.file, containerID); err != nil {
		return nil, fmt.Errorf("pin template %s: %w", r, err)
	}
	return p, nil
}

// writePin writes an owner's file that need not be durable: a crash that takes
// it takes the owner as well.
func (s *Store) writePin(path, containerID string) error {
	o := s.self
	o.ContainerID, o.Time = containerID, time.Now().UTC()
	data, err := json.Marshal(o)
	if err != nil {
		return err
	}
	f, err := s.fs.Create(path, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, s.fs.Remove(path))
	}
	return nil
}

// Dir is the absolute path of the version's directory.
func (p *Pin) Dir() string { return p.s.versionPath(p.ref) }

// ID is the version.
func (p *Pin) ID() checkpoint.ID { return p.ref.Version }

// Manifest is the version's, not to be changed.
func (p *Pin) Manifest() *checkpoint.Manifest { return p.manifest }

// Verify is like [Store.Verify], but for what is deferred.
func (p *Pin) Verify(ctx context.Context, deferred Deferred) error {
	return p.s.verify(ctx, p.Dir(), p.ref.Version, false, deferred)
}

// Release ends the pin.
func (p *Pin) Release(context.Context) error { return p.end(nil) }

// Consume ends the pin as well: a template is not used up.
func (p *Pin) Consume(context.Context) error { return p.end(nil) }

// Quarantine sets the version aside and ends the pin. It does not wait for the
// others that have pinned it: what they restore from is damaged.
func (p *Pin) Quarantine(ctx context.Context, reason string, logs map[string][]byte) error {
	return p.end(func() error { return p.s.QuarantineTemplate(ctx, p.ref, reason, logs) })
}

// end needs no lock of the store: whoever reads the pin while it goes sees
// either.
func (p *Pin) end(f func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return fmt.Errorf("pin of template %s: %w", p.ref, checkpoint.ErrNotFound)
	}
	if f != nil {
		if err := f(); err != nil {
			return err
		}
	}
	if err := p.s.fs.Remove(p.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pin of template %s: %w", p.ref, err)
	}
	p.ended = true
	return nil
}

// sweepTemplates is the part of Sweep that concerns templates.
func (s *Store) sweepTemplates(ctx context.Context) error {
	removed, err := s.PruneTemplates(ctx)
	for _, r := range removed {
		log.G(ctx).WithFields(log.Fields{"checkpoint_id": r.Version, "op": "prune", "reason": "template has a newer version"}).Info("removed a version of template " + r.Namespace + "/" + r.Name)
	}
	return err
}
