//! What a server says when it is ready: its addresses, and URLs to paste.

use std::sync::Arc;
use std::time::Instant;

use ebb_timeline::Service;
use ebb_timeline::api::types::CreateProject;
use ebb_timeline::service::Caller;
use ebb_types::ProjectName;

use super::config::Settings;
use super::lock::NodeFile;
use super::service_failure;
use crate::failure::Failure;
use crate::output::facts;

/// Makes the first project if that was asked for and there is none, and prints where everything is.
pub async fn show(
    settings: &Settings,
    node: &NodeFile<'_>,
    service: &Arc<Service>,
    begun: Instant,
) -> Result<(), Failure> {
    let about = facts([
        ("postgres", node.proxy.clone()),
        ("api", node.api.clone()),
        ("data", settings.data.display().to_string()),
        ("bucket", settings.bucket.clone()),
        ("ca", node.ca.display().to_string()),
    ]);
    eprintln!("ebb {} is ready after {:.0} ms", node.version, begun.elapsed().as_secs_f64() * 1000.0);
    eprint!("{}", indented(&about));
    if let Some(first) = &settings.first_project {
        // On stdout, not stderr: stderr is what ends up in log files, and the URLs hold a password.
        print!("{}", first_urls(service, first).await?);
    }
    eprintln!("Ctrl-C suspends every compute and stops the server.");
    Ok(())
}

/// The URLs of the first project there is; made under the name `first` if there is none.
async fn first_urls(service: &Arc<Service>, first: &ProjectName) -> Result<String, Failure> {
    let caller = Caller::ebb();
    let projects = service.projects().await.map_err(service_failure)?;
    let name = match projects.into_iter().next() {
        Some(project) => project.name,
        None => {
            let request = CreateProject { name: first.clone(), current: None, pg_major: None };
            service.create_project(&caller, request).await.map_err(service_failure)?.value.project.name
        }
    };
    let mut text = format!("project {name}\n");
    for branch in ["prod", "dev"] {
        // `dev` may have been deleted since.
        if let Ok(found) = service.branch_url(&caller, name.as_str(), branch).await {
            text.push_str(&format!("  psql '{}'\n", found.url));
        }
    }
    Ok(text)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
